"""Text in: rows from files or from the built-in tasks, tokenised and put in order.

`sources` gives the three views of a data set (demonstrations, comparisons, prompts),
`stream` issues prompts without end, `tokenizer` turns text into ids, `batching` groups
sequences, `cache` fetches what the built-in tasks need. Whatever is wrong with data is a
`DataError` that names the place and the fix.
"""
