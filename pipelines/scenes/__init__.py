"""A made-up corpus: pictures of coloured shapes with captions and questions, for a machine that has no data at hand."""
