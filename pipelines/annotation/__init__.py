"""Answers for whole datasets: one row out for every row in, committed by chunks, whatever is killed meanwhile."""
