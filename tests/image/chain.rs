//! What a runtime does with a list of plugins: each in turn, with the result of the one before.
