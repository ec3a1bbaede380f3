"""Any record to a row of one contract, and rows to padded batches."""
