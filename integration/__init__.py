"""Tests of vmsnap against real hypervisors and real guests, and the laboratory they run in."""
