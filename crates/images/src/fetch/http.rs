//! HTTP and HTTPS, by ureq and rustls. The certificates that are trusted are the host's.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::{FetchError, Proxies, Stream, forward};
use crate::apt::AptConf;

/// Where Linux distributions keep the certificates of authorities.
const CERTIFICATES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 8;

type Response = ureq::http::Response<ureq::Body>;

pub(super) struct Client {
    tls: TlsConfig,
    proxies: Proxies,
    /// One per proxy, so that connections are used again.
    agents: RefCell<HashMap<Way, ureq::Agent>>,
    /// What registries of OCI images gave us to show to them, by host.
    tokens: RefCell<HashMap<String, String>>,
}

/// What is asked for, beside the URL.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Ask<'a> {
    /// All from there on.
    pub(super) offset: u64,
    /// Only if it is still this version, and else all.
    pub(super) version: Option<&'a str>,
    /// In these forms.
    pub(super) accept: Option<&'a str>,
}

/// How a URL is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Way {
    Direct,
    /// By a tunnel through this proxy.
    Tunnel(String),
    /// By asking this proxy for the URL.
    Forward(String),
}

impl Client {
    pub(super) fn new(proxies: Proxies, conf: &AptConf) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(certificates(conf))))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        Self { tls, proxies, agents: RefCell::default(), tokens: RefCell::default() }
    }

    fn config(&self, proxy: Option<ureq::Proxy>) -> ureq::config::Config {
        ureq::Agent::config_builder()
            .tls_config(self.tls.clone())
            .proxy(proxy)
            // Redirects are followed here, as each URL may have a proxy of its own.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("lodge/", env!("CARGO_PKG_VERSION")))
            .build()
    }

    pub(super) fn get(&self, url: &str, ask: &Ask) -> Result<Stream, FetchError> {
        let broken = |reason: String| FetchError::Connection { url: url.to_owned(), reason };
        let response = self.follow(url, ask)?;
        let status = response.status().as_u16();
        let offset: u64 = match status {
            200 => 0,
            206 => {
                let range = header(&response, "Content-Range");
                let first =
                    range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
                first.ok_or_else(|| broken("the server's answer has no range".to_owned()))?
            }
            404 | 410 => return Err(FetchError::NotFound { url: url.to_owned() }),
            _ => return Err(FetchError::Status { url: url.to_owned(), status }),
        };
        let size = response.body().content_length().map(|rest| offset.saturating_add(rest));
        let strong = header(&response, "ETag").filter(|tag| !tag.starts_with("W/"));
        let version = strong.or_else(|| header(&response, "Last-Modified")).map(str::to_owned);
        // The reader has no limit of its own: callers bound what they take.
        let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Stream { reader: Box::new(reader), offset, size, version })
    }

    /// The answer for `url`, or for where it leads.
    fn follow(&self, url: &str, ask: &Ask) -> Result<Response, FetchError> {
        let bad = || FetchError::BadUrl { url: url.to_owned() };
        let mut target = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let request = || {
                self.request(&target, ask).map_err(|error| match error {
                    ureq::Error::BadUri(_) | ureq::Error::Http(_) => bad(),
                    other => FetchError::Connection { url: target.clone(), reason: reason(&other) },
                })
            };
            let mut response = request()?;
            if response.status().as_u16() == 401 && self.take_token(&target, &response)? {
                response = request()?;
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = header(&response, "Location").ok_or_else(bad)?;
            let next = if location.starts_with('/') && !location.starts_with("//") {
                let end = target.find("://").and_then(|at| Some(at + 3 + target[at + 3..].find('/')?));
                format!("{}{location}", &target[..end.unwrap_or(target.len())])
            } else {
                location.to_owned()
            };
            let secure = next.starts_with("https://");
            if !secure && (target.starts_with("https://") || !next.starts_with("http://")) {
                return Err(FetchError::Redirect { url: target, to: next });
            }
            target = next;
        }
        Err(FetchError::Redirect { url: url.to_owned(), to: target })
    }

    fn request(&self, url: &str, ask: &Ask) -> Result<Response, ureq::Error> {
        let Ask { offset, version, accept } = *ask;
        let way = match self.proxies.of(url) {
            None => Way::Direct,
            // A proxy without a scheme is an HTTP proxy, and one reached by HTTPS gets tunnels only.
            Some(proxy) if url.starts_with("http://") && !proxy.starts_with("https://") => {
                Way::Forward(if proxy.contains("://") { proxy } else { format!("http://{proxy}") })
            }
            Some(proxy) => Way::Tunnel(proxy),
        };
        let mut request = self.agent(&way)?.get(url);
        if offset > 0 {
            request = request.header("Range", format!("bytes={offset}-"));
            if let Some(version) = version {
                request = request.header("If-Range", version);
            }
        }
        if let Some(accept) = accept {
            request = request.header("Accept", accept);
        }
        if let Some(token) = self.tokens.borrow().get(host(url)) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Way::Forward(proxy) = &way
            && let Some(credentials) = credentials(proxy)
        {
            request = request.header("Proxy-Authorization", format!("Basic {}", BASE64.encode(credentials)));
        }
        request.call()
    }

    /// Gets the token that a registry wants to see, which it gives to everybody; whether there is one now that was not before.
    ///
    /// Source: distribution's "Token Authentication Specification".
    fn take_token(&self, url: &str, response: &Response) -> Result<bool, FetchError> {
        const LARGEST: u64 = 1 << 20;
        #[derive(serde::Deserialize)]
        struct Answer {
            #[serde(alias = "access_token")]
            token: String,
        }
        let Some(challenge) =
            header(response, "WWW-Authenticate").and_then(|text| text.strip_prefix("Bearer "))
        else {
            return Ok(false);
        };
        let field = |name: &str| {
            let rest = &challenge[challenge.find(&format!("{name}=\""))? + name.len() + 2..];
            Some(rest[..rest.find('"')?].to_owned())
        };
        // The token is nobody else's: over HTTPS, or on this host.
        let Some(realm) =
            field("realm").filter(|realm| realm.starts_with("https://") || url.starts_with("http://"))
        else {
            return Ok(false);
        };
        let escape = |text: String| text.replace('&', "%26").replace(' ', "%20").replace('#', "%23");
        let more = ["service", "scope"].into_iter().filter_map(|name| Some((name, escape(field(name)?))));
        let query: Vec<String> = more.map(|(name, value)| format!("{name}={value}")).collect();
        let place = format!("{realm}{}{}", if realm.contains('?') { '&' } else { '?' }, query.join("&"));
        if host(&place) == host(url) && self.tokens.borrow().contains_key(host(url)) {
            return Ok(false);
        }
        let answer = self.get(&place, &Ask::default())?;
        let mut text = Vec::new();
        let broken = |reason: String| FetchError::Connection { url: place.clone(), reason };
        answer.reader.take(LARGEST).read_to_end(&mut text).map_err(|error| broken(error.to_string()))?;
        let answer: Answer = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
        let sound = answer.token.bytes().all(|byte| byte.is_ascii_graphic());
        let old = self.tokens.borrow_mut().insert(host(url).to_owned(), answer.token.clone());
        Ok(sound && old != Some(answer.token))
    }

    fn agent(&self, way: &Way) -> Result<ureq::Agent, ureq::Error> {
        if let Some(agent) = self.agents.borrow().get(way) {
            return Ok(agent.clone());
        }
        let agent = match way {
            Way::Direct => self.config(None).new_agent(),
            Way::Tunnel(proxy) => self.config(Some(ureq::Proxy::new(proxy)?)).new_agent(),
            Way::Forward(proxy) => {
                let uri: Uri = proxy.parse().map_err(|_| ureq::Error::InvalidProxyUrl)?;
                forward::agent(self.config(None), uri)
            }
        };
        self.agents.borrow_mut().insert(way.clone(), agent.clone());
        Ok(agent)
    }
}

/// What went wrong, in words for people.
fn reason(error: &ureq::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("io: ").unwrap_or(&text);
    // Without the authorities' certificates no server's can be checked.
    let hint =
        if text.contains("UnknownIssuer") { " (is the package ca-certificates installed?)" } else { "" };
    format!("{text}{hint}")
}

/// The host of a URL, with its port.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or(rest)
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// `user:password` of a URL, percent signs decoded.
fn credentials(url: &str) -> Option<Vec<u8>> {
    let (_, rest) = url.split_once("://")?;
    let (encoded, _) = rest.split('/').next()?.rsplit_once('@')?;
    let mut bytes = encoded.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        decoded.push(if byte == b'%' { (digit()? * 16 + digit()?) as u8 } else { byte });
    }
    Some(decoded)
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

#[cfg(test)]
mod tests {
    use super::credentials;

    #[test]
    fn credentials_of_a_proxy() {
        assert_eq!(credentials("http://me:a%40b%3a@proxy:3128/").as_deref(), Some(&b"me:a@b:"[..]));
        assert_eq!(credentials("http://proxy:3128/x@y"), None);
        assert_eq!(credentials("http://a%4@proxy"), None);
    }
}
