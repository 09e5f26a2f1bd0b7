//! HTTP and HTTPS, by ureq and rustls. The certificates that are trusted are the host's.

use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::{FetchError, Proxies, Stream};
use crate::apt::AptConf;

/// Where Linux distributions keep the certificates of authorities.
const CERTIFICATES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);

pub(super) struct Client {
    agent: ureq::Agent,
    proxies: Proxies,
}

impl Client {
    pub(super) fn new(proxies: Proxies, conf: &AptConf) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(certificates(conf))))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("lodge/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), proxies }
    }

    pub(super) fn get(&self, url: &str, offset: u64) -> Result<Stream, FetchError> {
        let broken = |reason: String| FetchError::Connection { url: url.to_owned(), reason };
        let proxy = self.proxies.of(url).map(|proxy| ureq::Proxy::new(&proxy)).transpose();
        let proxy = proxy.map_err(|_| broken("the setting of the proxy is not a URL".to_owned()))?;
        let mut request = self.agent.get(url).config().proxy(proxy).build();
        if offset > 0 {
            request = request.header("Range", format!("bytes={offset}-"));
        }
        let response = request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => FetchError::BadUrl { url: url.to_owned() },
            other => broken(other.to_string()),
        })?;
        let status = response.status().as_u16();
        let offset: u64 = match status {
            200 => 0,
            206 => {
                let range = response.headers().get("Content-Range").and_then(|range| range.to_str().ok());
                let first =
                    range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                first.ok_or_else(|| broken("the server's answer has no range".to_owned()))?
            }
            404 | 410 => return Err(FetchError::NotFound { url: url.to_owned() }),
            _ => return Err(FetchError::Status { url: url.to_owned(), status }),
        };
        let size = response.body().content_length().map(|rest| offset.saturating_add(rest));
        // The reader has no limit of its own: callers bound what they take.
        let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Stream { reader: Box::new(reader), offset, size })
    }
}

/// The host's certificates of authorities. Without any, HTTPS fails and plain HTTP goes on: archives are signed.
fn certificates(conf: &AptConf) -> Vec<Certificate<'static>> {
    let named = std::env::var("SSL_CERT_FILE").ok().or(conf.get("Acquire::https::CaInfo").map(str::to_owned));
    let paths = named.iter().map(String::as_str).chain(CERTIFICATES);
    let Some(pem) = paths.filter_map(|path| std::fs::read(path).ok()).next() else { return Vec::new() };
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    parse_pem(&pem).filter_map(certificate).collect()
}
