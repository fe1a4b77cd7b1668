"""What a gateway tells of each request: one record, from first byte to last; of it a count, times and a line."""
