//! Plain HTTP through a proxy as proxies of archives expect it: the whole URL in the request line (RFC 9112, 3.2.2).
//!
//! ureq asks proxies for a tunnel (CONNECT) also where the target is plain HTTP. Caches for packages cannot cache
//! that, and many proxies refuse tunnels to port 80. So connections for such requests go to the proxy itself, and the
//! request line is completed on its way out.

use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport,
};

/// An agent whose requests, for `http://` only, all go through the proxy at `proxy`.
pub(super) fn agent(config: ureq::config::Config, proxy: Uri) -> ureq::Agent {
    let connector = ().chain(TcpConnector::default()).chain(WholeUrl);
    ureq::Agent::with_parts(config, connector, ToProxy { proxy, resolver: DefaultResolver::default() })
}

/// Resolves every name to the proxy's address.
#[derive(Debug)]
struct ToProxy {
    proxy: Uri,
    resolver: DefaultResolver,
}

impl Resolver for ToProxy {
    fn resolve(
        &self,
        _uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        self.resolver.resolve(&self.proxy, config, timeout)
    }
}

#[derive(Debug)]
struct WholeUrl;

impl<In: Transport> Connector<In> for WholeUrl {
    type Out = Forwarded<In>;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let authority = details.uri.authority().map_or("", |authority| authority.as_str());
        let host = authority.rsplit('@').next().unwrap_or_default();
        let origin = format!("http://{host}");
        Ok(chained.map(|inner| Forwarded { inner, origin }))
    }
}

/// A connection to the proxy, for requests to one host.
#[derive(Debug)]
struct Forwarded<T> {
    inner: T,
    origin: String,
}

impl<T: Transport> Transport for Forwarded<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    /// A request begins an output of its own, and is sent whole: it has no body.
    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        const METHOD: &[u8] = b"GET ";
        let output = self.inner.buffers().output();
        let longer = amount + self.origin.len();
        let mut amount = amount;
        if output[..amount].starts_with(METHOD) && output[METHOD.len()..].starts_with(b"/") {
            if longer > output.len() {
                return Err(ureq::Error::BadUri("the URL is too long".to_owned()));
            }
            output.copy_within(METHOD.len()..amount, METHOD.len() + self.origin.len());
            output[METHOD.len()..][..self.origin.len()].copy_from_slice(self.origin.as_bytes());
            amount = longer;
        }
        self.inner.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}
