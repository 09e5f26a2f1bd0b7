//! Which proxy a URL is reached through: apt's settings first (apt-transport-http(1)), then the environment.

use crate::apt::AptConf;

/// The host's settings of proxies.
#[derive(Debug, Default, Clone)]
pub struct Proxies {
    conf: AptConf,
    http: Option<String>,
    https: Option<String>,
    except: Vec<String>,
}

impl Proxies {
    /// Takes apt's settings, and `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` from `variable`.
    pub fn new(conf: &AptConf, variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| variable(name).or_else(|| variable(&name.to_ascii_uppercase()));
        let set = |value: Option<String>| value.filter(|value| !value.is_empty());
        let all = set(either("all_proxy"));
        let except = either("no_proxy").unwrap_or_default();
        Self {
            conf: conf.clone(),
            // Not HTTP_PROXY: a web server sets that from a header of the request.
            http: set(variable("http_proxy")).or(all.clone()),
            https: set(either("https_proxy")).or(all),
            except: except.split(',').map(|host| host.trim().to_ascii_lowercase()).collect(),
        }
    }

    /// The proxy for this URL, or `None` to go there directly.
    pub fn of(&self, url: &str) -> Option<String> {
        let (scheme, rest) = url.split_once("://")?;
        let authority = rest.split('/').next()?.rsplit('@').next()?;
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_ascii_lowercase();
        let kinds: &[&str] = if scheme == "https" { &["https", "http"] } else { &["http"] };
        let names = kinds
            .iter()
            .flat_map(|kind| [format!("Acquire::{kind}::Proxy::{host}"), format!("Acquire::{kind}::Proxy")]);
        if let Some(value) = names.filter_map(|name| self.conf.get(&name)).find(|value| !value.is_empty()) {
            return (!["DIRECT", "false"].iter().any(|none| value.eq_ignore_ascii_case(none)))
                .then(|| value.to_owned());
        }
        let excepted = self.except.iter().filter(|entry| !entry.is_empty()).any(|entry| {
            let suffix = entry.trim_start_matches(['*', '.']);
            entry == "*" || host == suffix || host.ends_with(&format!(".{suffix}"))
        });
        let proxy = if scheme == "https" { &self.https } else { &self.http };
        proxy.clone().filter(|_| !excepted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_goes_before_the_environment() {
        let mut conf = AptConf::default();
        let environment = |name: &str| match name {
            "http_proxy" => Some("http://env.example:1".to_owned()),
            "no_proxy" => Some("localhost, .inside.example,other.example".to_owned()),
            _ => None,
        };
        let of = |conf: &AptConf, url: &str| Proxies::new(conf, environment).of(url);
        assert_eq!(of(&conf, "http://a.example/x").as_deref(), Some("http://env.example:1"));
        assert_eq!(of(&conf, "https://a.example/x"), None);
        assert_eq!(of(&conf, "http://localhost:8080/x"), None);
        assert_eq!(of(&conf, "http://b.inside.example/x"), None);
        assert_eq!(of(&conf, "http://another.example/x").as_deref(), Some("http://env.example:1"));
        conf.parse(
            "Acquire::http::Proxy \"http://apt.example:2\"; Acquire::http::Proxy::c.example \"DIRECT\";",
        );
        assert_eq!(of(&conf, "http://localhost:8080/x").as_deref(), Some("http://apt.example:2"));
        assert_eq!(of(&conf, "https://user@a.example:443/x").as_deref(), Some("http://apt.example:2"));
        assert_eq!(of(&conf, "http://c.example/x"), None);
    }
}
