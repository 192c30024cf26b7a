"""The model: embeddings of the columns, DLRM and DCN-v2, and what tells how good they are."""
