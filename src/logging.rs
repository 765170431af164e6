//! Log lines: one JSON object each, to stderr or to a rotating file that many processes share safely
//! (`spec/plugin.md` 5).
