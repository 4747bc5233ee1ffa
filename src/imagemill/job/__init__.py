"""A job on disk: the open job, its store, paths, documents, plan and ledger.

Nothing here runs a model.
"""
