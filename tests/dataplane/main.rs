//! What packets do on a node, beside the rules of others: the flow matrix of `spec/dataplane.md` 26 and what belongs to it.

mod beside;
mod changes;
mod cleanup;
mod egress;
mod matrix;
mod proxy;
mod six;
mod sources;
#[path = "../support/mod.rs"]
mod support;
mod takeover;
mod talk;
mod upstream;
mod world;
