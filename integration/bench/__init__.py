"""Measurements that anyone can repeat: ratios within one run, printed and written to build/bench."""
