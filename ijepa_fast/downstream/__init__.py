"""What frozen features are worth downstream: the evaluations that papers report, and the commands that run them.

A task is a function in a module of its own, named in ``tasks.TASKS``; features are extracted once for all of them.
"""
