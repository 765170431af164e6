//! The CNI plugin: protocol and handlers.
