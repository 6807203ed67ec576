"""Benchmarks that run from the installed package: every op beside its peers, and whole training steps.

    ijepa-fast bench
    ijepa-fast fastest

``cases/`` holds the inputs of every op, the ways to compute it, and what it must at least move and compute: its floors.
``measure.py`` is the timer. ``table.py`` checks every provider against the op's definition, then times it beside the
floors of the same run. ``steps.py`` runs whole steps and says whether two ways to compute a step train the same.
``fastest.py`` tries the options of a step, each in a process of its own (``child_process.py``).
"""
