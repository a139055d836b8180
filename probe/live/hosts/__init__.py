"""The drop-in probe inside of trainers: what each of them tells it, and what it does there."""
