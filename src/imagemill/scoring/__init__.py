"""How many rows of a job are right? `imagemill score` compares them with known labels.

truth.py     what `--truth` says
tables.py    columns of CSV and Parquet files
places.py    full path, folder and name of the image of a row
matching.py  which image has which true values
values.py    from true values to classes of the model
figures.py   figures from one pass over the parts
record.py    the result
score.py     all of these, in order

The package is not called `score`, because `imagemill.score` is the public function.
"""
