"""The steps of a run: each has `plan(run)`, pure and printable, and `execute(run)`."""
