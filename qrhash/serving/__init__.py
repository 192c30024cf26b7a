"""`qrhash serve`: the scores of a trained model, and vectors of a snapshot, over HTTP.

A request's body becomes an Arrow table (`bodies`), waits with others until they are a batch
(`batcher`), is read as the rows of a training are (`reading`) and scored by a function that was
compiled before the first request (`model`). What serves is never changed in its place: a newer
checkpoint, snapshot or delta takes its place by one reference (`reloading`).
"""
