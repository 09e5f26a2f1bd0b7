//! What the figures say.

use std::collections::BTreeSet;

use super::{Column, Workload};
use crate::monitor::median;

/// Engines that are compared with, rather than compared.
const BASES: [&str; 2] = ["native", "tcg"];

impl Column {
    /// The median of a workload's processor time, nanoseconds.
    fn cpu(&self, name: &str) -> Option<f64> {
        let samples = self.samples.get(name)?;
        Some(median(samples.iter().map(|s| s.cpu as f64)))
    }

    /// The median of a workload's time on the clock for an iteration, nanoseconds.
    fn wall_each(&self, name: &str) -> Option<f64> {
        let samples = self.samples.get(name)?;
        Some(median(samples.iter().map(|s| s.wall as f64 / s.iterations as f64)))
    }

    /// How much more two threads do than one in the same time.
    fn scaling(&self) -> Option<f64> {
        Some(2.0 * self.wall_each("sum-1")? / self.wall_each("sum-2")?)
    }
}

/// What is printed for each workload beside its time on the host: the ratio of two engines' times.
struct Ratio<'a> {
    title: String,
    over: &'a Column,
    under: &'a Column,
}

impl Ratio<'_> {
    fn of(&self, name: &str) -> Option<f64> {
        Some(self.over.cpu(name)? / self.under.cpu(name)?)
    }

    fn geomean<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<f64> {
        let logs: Vec<f64> = names.filter_map(|name| self.of(name)).map(f64::ln).collect();
        (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
    }
}

fn find<'a>(columns: &'a [(String, Column)], engine: &str) -> Option<&'a Column> {
    columns.iter().find(|(name, _)| name == engine).map(|(_, column)| column)
}

fn ratios(columns: &[(String, Column)]) -> Vec<Ratio<'_>> {
    let (native, tcg) = (find(columns, "native"), find(columns, "tcg"));
    let to_native = columns.iter().filter(|(engine, _)| engine != "native");
    let slower = to_native
        .filter_map(|(engine, over)| Some(Ratio { title: format!("{engine}/native"), over, under: native? }));
    let lodge = columns.iter().filter(|(engine, _)| !BASES.contains(&engine.as_str()));
    let faster =
        lodge.filter_map(|(engine, under)| Some(Ratio { title: format!("tcg/{engine}"), over: tcg?, under }));
    slower.chain(faster).collect()
}

fn row(first: &str, second: &str, cells: impl Iterator<Item = Option<f64>>) {
    let cells: String =
        cells.map(|cell| cell.map_or(format!("{:>18}", "-"), |value| format!("{value:18.2}"))).collect();
    println!("{first:16}{second:>12}{cells}");
}

/// Prints a table: a row for each workload, category and summary, a column for each ratio.
pub fn print(workloads: &[Workload], columns: &[(String, Column)]) {
    let ratios = ratios(columns);
    let native = find(columns, "native");
    let titles: String = ratios.iter().map(|ratio| format!("{:>18}", ratio.title)).collect();
    println!("\n{:16}{:>12}{titles}", "host CPU time", "native ms");
    for (name, _) in workloads {
        let time =
            native.and_then(|column| column.cpu(name)).map_or("-".into(), |t| format!("{:.1}", t / 1e6));
        row(name, &time, ratios.iter().map(|ratio| ratio.of(name)));
    }
    println!("geometric means");
    let mut categories: Vec<&str> = workloads.iter().map(|(_, category)| category.as_str()).collect();
    categories.dedup();
    for category in categories.iter().copied().chain(["all"]) {
        let names = || {
            workloads.iter().filter(move |(_, c)| category == "all" || c == category).map(|(n, _)| n.as_str())
        };
        row(category, "", ratios.iter().map(|ratio| ratio.geomean(names())));
    }
    let tcg_boot = find(columns, "tcg").and_then(|tcg| tcg.boot);
    println!(
        "\n{:16}{:>12}{:>12}{:>12}{:>12}{:>16}",
        "", "boot CPU s", "wall s", "tcg/", "scaling", "resident MiB"
    );
    for (engine, column) in columns {
        let cell = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let [cpu, wall] = [0, 1].map(|n| column.boot.map(|boot| boot[n]));
        let faster = tcg_boot.zip(cpu).map(|(tcg, cpu)| tcg[0] / cpu);
        let cells: String =
            [cpu, wall, faster, column.scaling()].map(|value| format!("{:>12}", cell(value))).concat();
        println!("{engine:16}{cells}{:16.1}", column.resident);
    }
}

/// Workloads that failed, and those whose checksums differ.
pub fn errors(workloads: &[Workload], columns: &[(String, Column)]) -> Vec<String> {
    let mut errors = Vec::new();
    for (name, _) in workloads {
        for (engine, column) in columns {
            errors.extend(column.failures.get(name).map(|why| format!("{name} on {engine}: {why}")));
        }
        let sums = columns.iter().flat_map(|(engine, column)| {
            let samples = column.samples.get(name).into_iter().flatten();
            samples.map(move |sample| (sample.checksum.as_str(), engine.as_str()))
        });
        let sums: BTreeSet<(&str, &str)> = sums.collect();
        if sums.iter().any(|(sum, _)| Some(sum) != sums.first().map(|(sum, _)| sum)) {
            errors.push(format!("{name}: checksums differ: {sums:?}"));
        }
    }
    errors
}
