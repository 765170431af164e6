//! CNI configuration, arguments, results and errors, per version (`spec/plugin.md` 1 to 3, 12).
