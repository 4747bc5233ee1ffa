"""What is measured before a job: int8, its agreement with fp32, the batch size."""
