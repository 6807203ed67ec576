"""Inputs of every benchmarked op, the ways to compute it, and its floors."""
