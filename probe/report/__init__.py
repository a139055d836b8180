"""What a person gets: numbers, rows, tables, names of charts."""
