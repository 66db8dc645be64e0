// Renders conversations with a chat template as Ollama does, by Go's own text/template.
//
// Standard input:  {"template": "...", "system": "...", "conversations": [[{"role": "...", "content": "..."}]]}
// Standard output: ["...", ...], one text a conversation.
//
// Ollama puts the Modelfile's system prompt before a conversation that begins with none, joins consecutive messages of one
// role with an empty line between, and gives a template that reads .Messages all of them at once. One that does not is
// rendered turn by turn with .System, .Prompt and .Response, and what comes after the last .Response is cut.
// Source: Ollama's docs/template.md, and template/template.go and server/prompt.go of its repository.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"text/template"
	"time"
)

type message struct {
	Role      string        `json:"role"`
	Content   string        `json:"content"`
	Thinking  string        `json:"thinking"`
	ToolName  string        `json:"tool_name"`
	ToolCalls []interface{} `json:"tool_calls"`
}

type request struct {
	Template      string       `json:"template"`
	System        string       `json:"system"`
	Conversations [][]*message `json:"conversations"`
}

var functions = template.FuncMap{
	"json":          func(v interface{}) string { b, _ := json.Marshal(v); return string(b) },
	"currentDate":   func(...string) string { return time.Now().Format("2006-01-02") },
	"yesterdayDate": func(...string) string { return time.Now().AddDate(0, 0, -1).Format("2006-01-02") },
}

const cut = "\x00response\x00" // stands for the answer that is still to come

func joined(all []*message) (string, []*message) {
	var system []string
	var out []*message
	for _, m := range all {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(out); n > 0 && out[n-1].Role == m.Role {
			out[n-1].Content += "\n\n" + m.Content
			continue
		}
		copied := *m
		out = append(out, &copied)
	}
	return strings.Join(system, "\n\n"), out
}

func render(t *template.Template, whole bool, all []*message) (string, error) {
	system, messages := joined(all)
	var out strings.Builder
	values := func(system, prompt, response string) map[string]interface{} {
		return map[string]interface{}{
			"System": system, "Prompt": prompt, "Response": response, "Messages": messages, "Tools": nil, "Suffix": "",
			"Think": false, "ThinkLevel": "", "IsThinkSet": false,
		}
	}
	if whole {
		err := t.Execute(&out, values(system, "", ""))
		return out.String(), err
	}
	var sys, prompt, response string
	flush := func() error {
		err := t.Execute(&out, values(sys, prompt, response))
		sys, prompt, response = "", "", ""
		return err
	}
	for _, m := range messages {
		full := response != "" || (m.Role == "system" && prompt != "")
		if full && m.Role != "assistant" {
			if err := flush(); err != nil {
				return "", err
			}
		}
		switch m.Role {
		case "system":
			sys = m.Content
		case "user":
			prompt = m.Content
		case "assistant":
			response = m.Content
		}
	}
	last := response
	response = last + cut
	if err := flush(); err != nil {
		return "", err
	}
	text := out.String()
	if at := strings.LastIndex(text, cut); at >= 0 {
		text = text[:at]
	}
	return text, nil
}

func run() error {
	var r request
	if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
		return err
	}
	t, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(r.Template)
	if err != nil {
		return err
	}
	whole := regexp.MustCompile(`\.Messages\b`).MatchString(r.Template)
	if !whole && !regexp.MustCompile(`\.Response\b`).MatchString(r.Template) { // Ollama appends it
		t = template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(r.Template + "{{ .Response }}"))
	}
	texts := []string{}
	for _, all := range r.Conversations {
		if r.System != "" && (len(all) == 0 || all[0].Role != "system") {
			all = append([]*message{{Role: "system", Content: r.System}}, all...)
		}
		text, err := render(t, whole, all)
		if err != nil {
			return err
		}
		texts = append(texts, text)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(texts)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
