//! gRPC on the unix socket, HTTP/1.1 for metrics and the sandbox. Knows only `model`.
pub mod http1;
