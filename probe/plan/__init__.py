"""Plans: from one small pilot, how large the batches of a run must be, and what it would cost.

Files: `settings` (the pilot), `passes` (what its passes cost), `sizes` (what is recommended), `page` (as it is
printed), `command` (pilot, plan, page and file).
"""
