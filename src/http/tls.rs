//! The TLS that agents speak: versions 1.2 and 1.3 with the algorithms that every server has.
//!
//! The lists are ours, for size: 100 KB less than all that the library can. RFC 8446 (section 9.1) and RFC 5289 name
//! what a server has for certain: AES-GCM, the curve P-256, signatures with RSA and ECDSA. Left out are
//! ChaCha20-Poly1305, which is for processors without AES instructions, X25519 and Ed25519, which no server has alone, and
//! private keys: no agent shows a certificate of its own. It must not read files or connect.

use crate::sys;
use rustls::SignatureScheme;
use rustls::crypto::ring::{cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, GetRandomFailed, KeyProvider, SecureRandom, WebPkiSupportedAlgorithms};
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::SigningKey;
use std::sync::Arc;
use webpki::ring as signature;

/// The TLS provider, here and nowhere else.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![kx_group::SECP256R1, kx_group::SECP384R1],
        signature_verification_algorithms: SIGNATURES,
        secure_random: &Kernel,
        key_provider: &NoKeys,
    })
}

/// Signatures of certificates and, by scheme, of the handshake. In TLS 1.2 the scheme for ECDSA does not fix the curve.
const SIGNATURES: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        signature::ECDSA_P256_SHA256,
        signature::ECDSA_P256_SHA384,
        signature::ECDSA_P384_SHA256,
        signature::ECDSA_P384_SHA384,
        signature::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
        signature::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
        signature::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
        signature::RSA_PKCS1_2048_8192_SHA256,
        signature::RSA_PKCS1_2048_8192_SHA384,
        signature::RSA_PKCS1_2048_8192_SHA512,
        signature::RSA_PKCS1_2048_8192_SHA256_ABSENT_PARAMS,
        signature::RSA_PKCS1_2048_8192_SHA384_ABSENT_PARAMS,
        signature::RSA_PKCS1_2048_8192_SHA512_ABSENT_PARAMS,
    ],
    mapping: &[
        (SignatureScheme::ECDSA_NISTP256_SHA256, &[signature::ECDSA_P256_SHA256, signature::ECDSA_P384_SHA256]),
        (SignatureScheme::ECDSA_NISTP384_SHA384, &[signature::ECDSA_P384_SHA384, signature::ECDSA_P256_SHA384]),
        (SignatureScheme::RSA_PSS_SHA256, &[signature::RSA_PSS_2048_8192_SHA256_LEGACY_KEY]),
        (SignatureScheme::RSA_PSS_SHA384, &[signature::RSA_PSS_2048_8192_SHA384_LEGACY_KEY]),
        (SignatureScheme::RSA_PSS_SHA512, &[signature::RSA_PSS_2048_8192_SHA512_LEGACY_KEY]),
        (SignatureScheme::RSA_PKCS1_SHA256, &[signature::RSA_PKCS1_2048_8192_SHA256]),
        (SignatureScheme::RSA_PKCS1_SHA384, &[signature::RSA_PKCS1_2048_8192_SHA384]),
        (SignatureScheme::RSA_PKCS1_SHA512, &[signature::RSA_PKCS1_2048_8192_SHA512]),
    ],
};

/// Random numbers from the kernel.
#[derive(Debug)]
struct Kernel;

impl SecureRandom for Kernel {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), GetRandomFailed> {
        sys::random_bytes(buffer).map_err(|_| GetRandomFailed)
    }
}

/// Refuses keys.
#[derive(Debug)]
struct NoKeys;

impl KeyProvider for NoKeys {
    fn load_private_key(&self, _: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        Err(rustls::Error::General("an agent has no private key".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{
        ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion,
    };

    const CA: &[u8] = include_bytes!("../../testdata/tls/ca.pem");
    const CERTIFICATE: &[u8] = include_bytes!("../../testdata/tls/server.pem");
    const KEY: &[u8] = include_bytes!("../../testdata/tls/server.key");

    /// What is agreed on with a server that has everything the library has, or less: version and cipher suite.
    fn agree(
        version: &'static SupportedProtocolVersion,
        with: fn(&mut CryptoProvider),
    ) -> Result<String, rustls::Error> {
        let mut theirs = rustls::crypto::ring::default_provider();
        with(&mut theirs);
        let server = ServerConfig::builder_with_provider(Arc::new(theirs))
            .with_protocol_versions(&[version])?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(CERTIFICATE).unwrap()],
                PrivateKeyDer::from_pem_slice(KEY).unwrap(),
            )?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(CA).unwrap())?;
        let client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let (mut client, mut server) =
            (ClientConnection::new(Arc::new(client), name)?, ServerConnection::new(Arc::new(server))?);
        while client.is_handshaking() || server.is_handshaking() {
            let mut flight = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut flight).unwrap();
            }
            server.read_tls(&mut flight.as_slice()).unwrap();
            server.process_new_packets()?;
            flight.clear();
            while server.wants_write() {
                server.write_tls(&mut flight).unwrap();
            }
            client.read_tls(&mut flight.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        let (version, suite) = (client.protocol_version().unwrap(), client.negotiated_cipher_suite().unwrap().suite());
        Ok(format!("{version:?} {suite:?}"))
    }

    #[test]
    fn servers_of_both_versions_agree() {
        use rustls::version::{TLS12, TLS13};
        let check = |version, with, expected: &str| {
            let got = agree(version, with).unwrap_or_else(|error| error.to_string());
            assert!(got.contains(expected), "{got} instead of {expected}");
        };
        check(&TLS13, |_| (), "TLSv1_3 TLS13_AES_");
        check(&TLS12, |_| (), "TLSv1_2 TLS_ECDHE_");
        check(
            &TLS13,
            |theirs| theirs.kx_groups.retain(|group| group.name() == rustls::NamedGroup::secp384r1),
            "TLSv1_3",
        );
        check(
            &TLS12,
            |theirs| theirs.kx_groups.retain(|group| group.name() == rustls::NamedGroup::secp256r1),
            "TLSv1_2",
        );
        check(&TLS13, |theirs| theirs.kx_groups.retain(|group| group.name() == rustls::NamedGroup::X25519), "peer");
    }

    #[test]
    fn keys_are_refused() {
        assert!(provider().key_provider.load_private_key(PrivateKeyDer::from_pem_slice(KEY).unwrap()).is_err());
    }
}
