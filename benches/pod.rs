//! ADD and DEL beside the bare kernel work.
fn main() {}
