//! `nft`, the firewall's own program: it takes and gives text.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::{Context, Error, Result};

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Applies a script: all of it or nothing.
///
/// # Errors
/// There is no `nft`, or it does not like it.
pub async fn apply(script: &str) -> Result<()> {
    run(&["-f", "-"], script).await.map(|_| ())
}

/// A table as it is, without what changes by itself; none, if there is no such table. `table` is its family and name.
///
/// # Errors
/// There is no `nft`.
pub async fn table(table: &str) -> Result<Option<String>> {
    listed(&[table.to_owned()]).await
}

/// Several tables one after another, as [`table`] gives them; none, if one is missing.
///
/// # Errors
/// There is no `nft`.
pub async fn listed(tables: &[String]) -> Result<Option<String>> {
    let script: String = tables.iter().map(|table| format!("list table {table}\n")).collect();
    match run(&["-s", "-t", "-f", "-"], &script).await {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.why.contains("No such file or directory") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a script could be applied: nothing changes.
///
/// # Errors
/// It could not.
pub async fn try_out(script: &str) -> Result<()> {
    run(&["-c", "-f", "-"], script).await.map(|_| ())
}

/// All that there is, everybody's (libnftables-json(5)).
///
/// # Errors
/// There is no `nft`, or no sense in what it says.
pub async fn ruleset() -> Result<serde_json::Value> {
    let text = run(&["-j", "list", "ruleset"], "").await?;
    serde_json::from_str(&text).context(|| "nft says nothing that can be read".into())
}

/// The names of all tables of a family.
///
/// # Errors
/// There is no `nft`, or the kernel has no nftables.
pub async fn tables(family: &str) -> Result<Vec<String>> {
    let text = run(&["list", "tables", family], "").await?;
    // "table inet name", a line each.
    Ok(text.lines().filter_map(|line| line.split_ascii_whitespace().nth(2)).map(str::to_owned).collect())
}

/// How many packets each named counter of the netdev family has seen: by table and name.
///
/// # Errors
/// There is no `nft`, or it says what nobody expects.
pub async fn counters() -> Result<BTreeMap<(String, String), u64>> {
    #[derive(Deserialize)]
    struct Listed {
        nftables: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        counter: Option<Counter>,
    }
    #[derive(Deserialize)]
    struct Counter {
        table: String,
        name: String,
        packets: u64,
    }
    let text = run(&["-j", "list", "counters", "netdev"], "").await?;
    let listed: Listed =
        serde_json::from_str(&text).context(|| "nft's counters are not understood".into())?;
    let counters = listed.nftables.into_iter().filter_map(|item| item.counter);
    Ok(counters.map(|counter| ((counter.table, counter.name), counter.packets)).collect())
}

async fn run(arguments: &[&str], input: &str) -> Result<String> {
    let child = Command::new("nft")
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new("nft is missing, by which the firewall is set")
            .help("sudo apt install nftables (or your system's like)"),
        _ => Error::new(format!("nft cannot be started: {error}")),
    })?;
    let ended = async {
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read to the end says why.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = timeout(PATIENCE, ended).await.context(|| "nft does not end".into())?;
    let output = output.context(|| "nft ended strangely".into())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let line = words.lines().next().unwrap_or("no reason given");
    Err(Error::new(format!("nft refuses: {}", line.trim_start_matches("/dev/stdin:"))))
}
