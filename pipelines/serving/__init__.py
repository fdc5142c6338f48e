"""The model behind HTTP, in the shape of the OpenAI API."""
