"""When things run: pipeline schedules as tables, what they cost, and the executor of any of them."""
