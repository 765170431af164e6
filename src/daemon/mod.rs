//! The node daemon: threads and wiring around the core.
