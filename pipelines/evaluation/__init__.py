"""How often a checkpoint answers a prepared split exactly right, per question type.

    prepared rows -> questions (each with the true earlier turns before it) -> batches of similar length
    -> greedy answers -> answers.jsonl and summary.json

An answer is right where it equals the truth, both stripped of surrounding space. The majority baseline gives every
question the most frequent true answer of its type: counted in the evaluated split itself, which flatters the baseline,
or in a training split where one is named. A blank image is a uniform grey of 127 in place of every picture.
"""
