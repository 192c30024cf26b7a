"""Tables that grow: a row for every key that has earned one, while keys come and go."""
