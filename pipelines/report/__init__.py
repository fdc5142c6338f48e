"""One HTML file that tells what a run did, what it learned and what it did not."""
