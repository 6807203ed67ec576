"""The folder of a run: what is written there, when, and what a later start may change."""
