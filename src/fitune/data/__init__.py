"""Files of conversations or text -> rows of token ids; what is wrong with them, by file and line."""
