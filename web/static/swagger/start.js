// Swagger UI 5.35.0 (swagger-ui-dist on npm) is next to this file, unchanged; see LICENSE and NOTICE.
// Shows the API described at openapi.json. validatorUrl would send it to a server elsewhere.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  validatorUrl: null,
  tryItOutEnabled: true,
});
