//! The operator's subcommands, one file each.
