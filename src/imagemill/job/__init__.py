"""The job folder on disk: its paths, documents, plan, parts and ledger. Nothing here runs a
model.
"""
