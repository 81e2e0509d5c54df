"""The paper's questions, asked again: each module is one experiment and one command, `python -m experiments.digits`."""
