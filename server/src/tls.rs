//! TLS for the HTTP port, from the same certificates as gRPC's.

use std::sync::Arc;

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use crate::{config::TlsConfig, exit::Failure};

/// What shakes hands with clients.
///
/// # Errors
/// Wrong usage when the certificates are no good.
pub fn acceptor(config: &TlsConfig) -> Result<TlsAcceptor, Failure> {
    let wrong =
        |option: &str, error: &dyn std::fmt::Display| Failure::usage(format_args!("{option}: {error}"));
    let chain = certificates(&config.certificate).map_err(|error| wrong("--tls-cert", &error))?;
    let key = PrivateKeyDer::from_pem_slice(&config.key).map_err(|error| wrong("--tls-key", &error))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong("TLS", &error))?;
    let builder = match &config.client_ca {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(authority).map_err(|error| wrong("--tls-client-ca", &error))? {
                roots.add(root).map_err(|error| wrong("--tls-client-ca", &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| wrong("--tls-client-ca", &error))?)
        }
    };
    let mut server = builder.with_single_cert(chain, key).map_err(|error| wrong("--tls-cert", &error))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err("holds no certificate".to_owned()),
        chain => chain.map_err(|error| error.to_string()),
    }
}
