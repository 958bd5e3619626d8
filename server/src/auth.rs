//! Who a client is: API keys, and the fingerprint by which the rest of the program knows their holders.

use std::sync::Arc;

use axum::http::HeaderMap;
use subtle::{Choice, ConstantTimeEq};
use tonic::Request;

use crate::exit::Failure;

/// The keys that clients may present. Their values are never shown.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[String]>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl ApiKeys {
    /// Checks that the keys can be sent in a header.
    ///
    /// # Errors
    /// Wrong usage for a key that is empty or not printable ASCII without spaces.
    pub fn new(keys: Vec<String>) -> Result<Self, Failure> {
        for key in &keys {
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(Failure::usage(
                    "--api-key: a key must be printable ASCII without spaces, and not empty",
                ));
            }
        }
        Ok(Self(keys.into()))
    }

    /// Whether everyone is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key of a request with these headers, if it may pass. Which key differs where is not to be learnt from the time it
    /// takes; the length of a key may be.
    pub fn admit(&self, headers: &HeaderMap) -> Option<Credential> {
        let presented = presented(headers)?;
        let equal = |key: &String| key.as_bytes().ct_eq(presented);
        let known: bool = self.0.iter().map(equal).fold(Choice::from(0), |any, one| any | one).into();
        known.then(|| Credential::of(presented))
    }
}

/// Who a client has proved to be: a fingerprint of its key or certificate, fit for logs. In the extensions of a request that came with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential(pub Arc<str>);

impl Credential {
    /// Hexadecimal digits of a fingerprint.
    const DIGITS: usize = 16;

    /// The fingerprint of a secret or a certificate: the beginning of its BLAKE3 hash.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex()[..Self::DIGITS].into())
    }

    /// What keeps the cached prefixes apart of those for whom a gateway speaks; `end_client` is empty for clients that speak for themselves.
    /// Fingerprints have no `/`, so nobody can name another's.
    pub fn speaking_for(&self, end_client: &str) -> Arc<str> {
        if end_client.is_empty() { self.0.clone() } else { format!("{}/{end_client}", self.0).into() }
    }

    /// The key that a request presented, or else the certificate of its connection; empty for a client of an open server.
    pub fn of_request<T>(request: &Request<T>) -> Self {
        if let Some(key) = request.extensions().get::<Self>() {
            return key.clone();
        }
        let certificates = request.peer_certs();
        // The client's own comes first; the others are of its authorities.
        let own = certificates.as_ref().and_then(|chain| chain.first());
        own.map_or_else(|| Self("".into()), |certificate| Self::of(certificate))
    }
}

/// `authorization: Bearer KEY`, `authorization: Api-Key KEY` or `x-api-key: KEY`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let value = headers.get("authorization")?.as_bytes();
    let space = value.iter().position(|&byte| byte == b' ')?;
    let (scheme, key) = value.split_at(space);
    let known = scheme.eq_ignore_ascii_case(b"bearer") || scheme.eq_ignore_ascii_case(b"api-key");
    known.then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn all_three_forms_carry_the_same_key_and_nothing_else_passes() {
        let keys = ApiKeys::new(vec!["other".into(), "s3cret".into()]).unwrap();
        for (name, value) in [
            ("authorization", "Bearer s3cret"),
            ("authorization", "bearer  s3cret"),
            ("authorization", "Api-Key s3cret"),
            ("x-api-key", "s3cret"),
        ] {
            assert_eq!(keys.admit(&headers(name, value)), Some(Credential::of(b"s3cret")), "{name}: {value}");
        }
        for (name, value) in [
            ("authorization", "s3cret"),
            ("authorization", "Basic s3cret"),
            ("authorization", "Bearer s3cre"),
            ("authorization", "Bearer s3cret2"),
            ("authorization", "Bearer "),
            ("x-api-key", ""),
            ("cookie", "s3cret"),
        ] {
            assert_eq!(keys.admit(&headers(name, value)), None, "{name}: {value}");
        }
        assert_eq!(keys.admit(&HeaderMap::new()), None);
    }

    #[test]
    fn a_fingerprint_is_the_documented_one_and_tells_keys_apart() {
        // `printf abc | b3sum | cut -c1-16`
        assert_eq!(&*Credential::of(b"abc").0, "6437b3ac38465133");
        assert_ne!(Credential::of(b"s3cret"), Credential::of(b"other"));
    }

    #[test]
    fn whom_a_gateway_speaks_for_cannot_pass_for_the_client_of_another() {
        let (gateway, other) = (Credential::of(b"gateway"), Credential::of(b"other"));
        assert_eq!(gateway.speaking_for(""), gateway.0);
        let names = [
            gateway.speaking_for("a"),
            gateway.speaking_for("b"),
            other.speaking_for("a"),
            gateway.0.clone(),
        ];
        for (at, name) in names.iter().enumerate() {
            assert!(!names[..at].contains(name), "{name}");
        }
        assert_ne!(
            Credential("".into()).speaking_for(&gateway.0),
            gateway.0,
            "an open server's clients name themselves only"
        );
    }

    #[test]
    fn keys_that_no_client_could_send_are_refused_at_start() {
        for key in ["", "with space", "ümlaut", "new\nline"] {
            assert!(ApiKeys::new(vec![key.into()]).is_err(), "{key:?}");
        }
    }
}
