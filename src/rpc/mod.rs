//! gRPC on the unix socket, HTTP/1.1 for metrics and the sandbox. Knows only `model`.
pub mod grpc;
pub mod h2;
pub mod health;
pub mod hpack;
pub mod http1;
pub mod proto;
pub mod stop;
