"""The steps of backup, provision, prune, verify and reconcile, over ports."""
