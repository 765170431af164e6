//! `grpc.health.v1.Health/Check` as probes and the entrypoint ask it (`spec/ipamd.md` 10.1).

use super::grpc::{Code, Status};
use super::proto::{HealthCheckRequest, HealthCheckResponse, Message};

/// The names that are served from the start: the server as a whole, and the one upstream registers.
pub const NAMES: [&str; 2] = ["", "grpc.health.v1.aws-node"];

/// `HealthCheckResponse.ServingStatus.SERVING`.
pub const SERVING: i32 = 1;

/// Answers an encoded `HealthCheckRequest`; `NOT_FOUND` for a name not in [`NAMES`].
pub fn check(body: &[u8]) -> Result<Vec<u8>, Status> {
    let HealthCheckRequest { service } = Message::decode(body)?;
    if NAMES.contains(&service.as_str()) {
        Ok(HealthCheckResponse { status: SERVING }.encode())
    } else {
        Err(Status::new(Code::NOT_FOUND, format!("unknown service {service:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_serve_and_others_are_not_found() {
        let ask = |service: &str| check(&HealthCheckRequest { service: service.to_owned() }.encode());
        assert_eq!(ask(""), Ok(vec![8, 1]));
        assert_eq!(ask("grpc.health.v1.aws-node"), Ok(vec![8, 1]));
        let status = ask("rpc.CNIBackend").unwrap_err();
        assert_eq!(status.code, Code::NOT_FOUND);
        assert_eq!(status.message, "unknown service \"rpc.CNIBackend\"");
        assert_eq!(check(&[0x0a, 9]).unwrap_err().code, Code::INTERNAL);
    }
}
