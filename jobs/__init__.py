"""Entry points: parse, build, run, report. Nothing imports them."""
