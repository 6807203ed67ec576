"""Benchmarks that run from the installed package: every op beside its peers, and whole training steps.

    ijepa-fast bench
    ijepa-fast fastest

``floors.py`` says what each op must move and compute, in closed form; ``cases.py`` (``linear_cases.py``,
``attention_cases.py``, ``optimizer_cases.py``) holds its inputs and the ways to compute it; ``measure.py`` times;
``ops_table.py`` checks every provider against a reference, then times it beside the floors of the same run;
``training.py`` times whole steps. ``fastest.py`` tries the ``options.py`` of a step, each in a process of its own
(``apart.py``), and holds it to the step as configured (``agreement.py``).
"""
