"""Run journal, locks and the book of environments, as files that a dead process cannot hold on to."""
