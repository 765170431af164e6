//! `grpc.health.v1.Health/Check` as probes and the entrypoint ask it (`spec/ipamd.md` 10.1).

use super::grpc::{Code, Status};
use super::proto::{HealthCheckRequest, HealthCheckResponse, Message};

/// The names that are served from the start: the server as a whole, and the one upstream registers.
pub const NAMES: [&str; 2] = ["", "grpc.health.v1.aws-node"];

/// Serves as long as the daemon's threads get on (`spec/operations.md` 5, BETTER).
pub const PROGRESS: &str = "enibox.progress";

/// `HealthCheckResponse.ServingStatus.SERVING`.
pub const SERVING: i32 = 1;
const NOT_SERVING: i32 = 2;

/// Answers an encoded `HealthCheckRequest`; `NOT_FOUND` for a name that is neither in [`NAMES`] nor [`PROGRESS`].
pub fn check(body: &[u8]) -> Result<Vec<u8>, Status> {
    check_with(body, true)
}

/// The same, where the threads may not get on.
pub fn check_with(body: &[u8], progress: bool) -> Result<Vec<u8>, Status> {
    let HealthCheckRequest { service } = Message::decode(body)?;
    if NAMES.contains(&service.as_str()) || service == PROGRESS {
        let status = if progress || service != PROGRESS { SERVING } else { NOT_SERVING };
        Ok(HealthCheckResponse { status }.encode())
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
        assert_eq!(ask(PROGRESS), Ok(vec![8, 1]));
        let held = |service: &str| check_with(&HealthCheckRequest { service: service.to_owned() }.encode(), false);
        assert_eq!((held(""), held(NAMES[1]), held(PROGRESS)), (Ok(vec![8, 1]), Ok(vec![8, 1]), Ok(vec![8, 2])));
        let status = ask("rpc.CNIBackend").unwrap_err();
        assert_eq!(status.code, Code::NOT_FOUND);
        assert_eq!(status.message, "unknown service \"rpc.CNIBackend\"");
        assert_eq!(check(&[0x0a, 9]).unwrap_err().code, Code::INTERNAL);
    }
}
