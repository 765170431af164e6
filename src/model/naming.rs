//! Names, marks, tables and priorities that others compute too (`spec/plugin.md` 6, 7; `spec/dataplane.md` 1).
